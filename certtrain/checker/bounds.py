"""Intervals of all operations' outputs, and linear bounds carried backward from forms of them.

Computed numbers are taken as they are: a computed form A' of an operation's inputs differs from the
exact A W by at most gamma |A| |W|, so that on inputs within |x| the bound moves by at most gamma
|A| (|W| |x|): the *charge*. The same sum bounds what the network's own rounding does in float32.
"""

import numpy as np

from .operations import InputVector, Kink, LinearMap, SelectionMap

MEMORY = 1 << 28
"""Bytes of forms that are carried backward together, roughly."""
UNDERFLOW = 1e-290
"""More than what underflow can change in one bound."""


class Enclosure:
    """Bounds of all operations' outputs over one box of inputs; valid for every evaluation of the
    network that ``arithmetic`` speaks of.

    Attributes:
        lower, upper: by position. sizes: bounds of absolute values; magnitudes: of all terms.
    """

    def __init__(self, network, arithmetic, lower, upper, refine=False, steps=None):
        """
        Args:
            lower, upper: of the inputs.
            refine: whether unstable neurons' inputs are bounded by linear bounds too (CROWN).
            steps: by position of a ReLU, further (entries, slopes below, slopes above) to refine
                with, as ``refine_with`` takes them.
        """
        self.network, self.arithmetic = network, arithmetic
        lower, upper = arithmetic.numbers(lower), arithmetic.numbers(upper)
        self.center, self.radius = arithmetic.middle(lower, upper)
        self.lower, self.upper, self.sizes, self.magnitudes = [], [], [], []
        self._keep(lower, upper, np.maximum(np.abs(lower), np.abs(upper)))
        for place, operation in enumerate(network.operations[1:], start=1):
            if isinstance(operation, Kink):
                self._refine(place, operation, refine, (steps or {}).get(place))
            self._enclose(operation)

    def _keep(self, lower, upper, magnitude):
        self.lower.append(lower)
        self.upper.append(upper)
        self.sizes.append(np.maximum(np.abs(lower), np.abs(upper)))
        self.magnitudes.append(magnitude)

    def _enclose(self, operation):
        """The interval of the next operation's output."""
        own, reads = self.arithmetic, operation.inputs
        size = own.magnitude(operation.magnitude([self.sizes[read] for read in reads]))
        if isinstance(operation, Kink):
            lower, upper = operation.interval(self.lower[reads[0]], self.upper[reads[0]])
            error = (own.network(operation.roundings) + own.gamma(1)) * size
        else:
            balls = [own.middle(self.lower[read], self.upper[read]) for read in reads]
            center, radius = (np.concatenate(parts) for parts in zip(*balls))
            center, radius = operation.product(center), operation.product(radius, absolute=True)
            if operation.bias is not None:
                center = center + operation.bias
            gamma = own.gamma(operation.terms + operation.inexact + 4)
            error = (3 * gamma + own.network(operation.roundings + operation.inexact)) * size
            lower, upper = center - radius, center + radius
        lower, upper = own.outward(lower, upper, error)
        self._keep(lower, upper, size)

    def _refine(self, place, operation, crown, step):
        (read,) = operation.inputs
        if crown:
            unstable = np.flatnonzero((self.lower[read] < 0) & (self.upper[read] > 0))
            behind = [self.network.operations[i] for i in self._behind(read)]
            if sum(not isinstance(one, (InputVector, SelectionMap)) for one in behind) > 1:
                self.tighten(read, unstable)  # intervals of a single linear map are exact
        if step is not None:
            entries, neurons, below, above = step
            self.tighten(read, entries, neurons, below, above)

    def _behind(self, position):
        """The operations that one depends on."""
        wanted = {position}
        for place in range(position, 0, -1):
            if place in wanted:
                wanted.update(self.network.operations[place].inputs)
        return wanted

    def tighten(self, position, entries, neurons=None, below=None, above=None):
        """Tighten the bounds of some entries of an operation's output by linear bounds.

        Args:
            neurons, below, above: slopes of these neurons for each entry's lower and upper bound.
        """
        size = self.network.operations[position].size
        for part in chunks(len(entries), self.rows_at_a_time(2)):
            own = entries[part]
            units = self.arithmetic.zeros(len(own), size)
            units[np.arange(len(own)), own] = self.arithmetic.numbers(np.ones(len(own)))
            for sign, slopes, ends in ((1, below, self.lower), (-1, above, self.upper)):
                given = None if slopes is None else (neurons, slopes[part])
                found = self.backward(position, sign * units, self.lines(given))
                better = np.maximum if sign > 0 else np.minimum
                ends[position][own] = better(ends[position][own], sign * found)
        low, up = self.lower[position], self.upper[position]
        self.sizes[position] = np.maximum(np.abs(low), np.abs(up))

    def rows_at_a_time(self, copies=1):
        widest = max(operation.size for operation in self.network.operations)
        return max(1, MEMORY // (64 * widest * copies))

    def lines(self, slopes=None, ends=None):
        """The lines of the ReLUs that are enclosed so far, by position.

        Args:
            slopes: (neurons (U,), slopes (R, U)) in place of CROWN's, of neurons by number.
            ends: by position, (lower, upper), (R, n) each, in place of the box's own.
        """
        found, network = {}, self.network
        for place in network.relus:
            operation = network.operations[place]
            (read,) = operation.inputs
            if place >= len(self.lower):
                break
            lower, upper = (ends or {}).get(place, (self.lower[read][None], self.upper[read][None]))
            chosen = operation.chosen(lower, upper)
            if slopes is not None:
                numbers, given = slopes
                first = network.first[place]
                own = (numbers >= first) & (numbers < first + operation.size)
                if own.any():
                    chosen = np.broadcast_to(chosen, (len(given), operation.size)).astype(
                        given.dtype
                    )
                    chosen[:, numbers[own] - first] = given[:, own]
            found[place] = operation.lines(lower, upper, chosen, self.arithmetic)
        return found

    def backward(self, position, forms, lines, pushed=None):
        """(R,) lower bounds of forms (R, n) of an operation's output over the box.

        Args:
            lines: by position of the ReLUs.
            pushed: by position of a ReLU, forms (R, n) to add at its input: multipliers of signs.
        """
        own, operations = self.arithmetic, self.network.operations
        constant = self.arithmetic.zeros(len(forms))
        size, pending = constant, {position: forms}
        for place in range(position, 0, -1):
            if place not in pending:
                continue
            forms, operation = pending.pop(place), operations[place]
            weight = np.abs(forms) @ self.magnitudes[place]
            error = own.network(operation.roundings) + 2 * own.gamma(4)
            if isinstance(operation, LinearMap):
                parts, number, offset = operation.adjoint(forms), forms, operation.bias
                error += own.gamma(operation.backward + operation.inexact + 4)
                error += own.network(operation.inexact)
            else:
                below, above, offset = lines[place]
                negative = np.minimum(forms, 0)
                parts = [np.maximum(forms, 0) * below + negative * above]
                number = negative
            cost = error * weight
            if offset is not None:
                move = (number * offset).sum(1) if offset.ndim > 1 else number @ offset
                reach = np.abs(number)
                reach = (reach * offset).sum(1) if offset.ndim > 1 else reach @ np.abs(offset)
                constant, weight = constant + move, weight + reach
                cost = cost + own.gamma(operation.size + 4) * reach
            if pushed is not None and place in pushed:
                parts[0] = parts[0] + pushed[place]
                cost = cost + own.gamma(2) * (np.abs(parts[0]) @ self.sizes[operation.inputs[0]])
            for read, part in zip(operation.inputs, parts):
                if read in pending:
                    part = pending[read] + part
                    cost = cost + own.gamma(2) * (np.abs(part) @ self.sizes[read])
                pending[read] = part
            constant, size = constant - cost, size + weight + cost
        return self._least(pending.get(0), constant, size)

    def _least(self, forms, constant, size):
        """The minimum over the box, and the rounding of the last sums."""
        own = self.arithmetic
        if forms is not None:
            reach = np.abs(forms) @ (np.abs(self.center) + self.radius)
            constant = constant + (forms @ self.center - np.abs(forms) @ self.radius)
            constant = constant - 3 * own.gamma(len(self.center) + 8) * reach
            size = size + 3 * reach
        if own.exact:
            return constant
        return constant - own.gamma(8 * len(self.network.operations) + 8) * size - UNDERFLOW

    def intervals(self, forms):
        """(R,) lower bounds of forms of the output by intervals, the last operation merged."""
        last, own = self.network.operations[-1], self.arithmetic
        position, constant = len(self.lower) - 1, own.zeros(len(forms))
        cost, size = constant, np.abs(forms) @ self.magnitudes[position]
        if isinstance(last, LinearMap) and len(last.inputs) == 1:
            error = own.network(last.roundings + last.inexact)
            error += own.gamma(last.backward + last.inexact + 4)
            cost = error * size
            if last.bias is not None:
                constant = forms @ last.bias
                cost = cost + own.gamma(last.size + 4) * (np.abs(forms) @ np.abs(last.bias))
            (forms,), (position,) = last.adjoint(forms), last.inputs
        low, up = self.lower[position], self.upper[position]
        least = np.maximum(forms, 0) @ low + np.minimum(forms, 0) @ up
        reach = np.abs(forms) @ np.maximum(np.abs(low), np.abs(up))
        cost = cost + own.gamma(2 * len(low) + 8) * reach + own.gamma(8) * (size + cost)
        found = constant + least - cost
        return found if own.exact else found - UNDERFLOW


def chunks(count, most):
    return [slice(first, min(first + most, count)) for first in range(0, count, most)]
