"""Packing: which blocks stand in one row of a batch."""

from bisect import insort
from collections.abc import Sequence
from heapq import heappop, heappush


def pack_rows(
    lengths: Sequence[int], row_tokens: int | None = None, attention_cost: float = 1 / 4096
) -> list[list[int]]:
    """Pack blocks into rows of at most `row_tokens`; without it, into the number of rows that costs least.

    Attention with a dense mask is computed between all positions of a row. The cost of R rows of L tokens is therefore
    taken as R L (1 + `attention_cost` L), which fits the shapes of small language models.

    Args:
        lengths: tokens of each block.

    Returns:
        The numbers of the blocks in each row.
    """
    longest = max(lengths)
    if row_tokens is not None:
        return pack_by_capacity(lengths, max(row_tokens, longest))

    def cost(bins: list[list[int]]) -> float:
        length = max(sum(lengths[i] for i in bin) for bin in bins)
        return len(bins) * length * (1 + attention_cost * length)

    most_rows = sum(lengths) / longest  # rows that are as short as the longest block
    counts = {max(1, round(most_rows * (1 / 6) ** (i / 39))) for i in range(40)}  # down to a sixth of them
    return min((pack_by_count(lengths, count) for count in sorted(counts)), key=cost)


def pack_by_capacity(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack into bins of at most `capacity` by best-fit decreasing. An item above the capacity has a bin of its own."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, bin), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fits = next((r for r in room if r[0] >= lengths[index]), None)
        if fits is None:
            bins.append([])
            fits = (capacity, len(bins) - 1)
        else:
            room.remove(fits)
        bins[fits[1]].append(index)
        insort(room, (fits[0] - lengths[index], fits[1]))
    return bins


def pack_by_count(lengths: Sequence[int], num_bins: int) -> list[list[int]]:
    """Pack into at most `num_bins` bins of nearly equal sums: longest first, each into the bin with the least in it
    (longest processing time first, Graham 1969)."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    filled = [(0, number) for number in range(num_bins)]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        tokens, number = heappop(filled)
        bins[number].append(index)
        heappush(filled, (tokens + lengths[index], number))
    return [bin for bin in bins if bin]
