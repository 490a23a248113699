"""Splits one labelled data set over emulated devices, evenly or with skewed labels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from frostline.protocol.errors import UsageError

# Shares are even for any practical purpose well before this, and far beyond it the draw overflows.
MAX_ALPHA = 1e6


def split_iid(labels: NDArray[np.int64], devices: int, seed: int) -> list[NDArray[np.int64]]:
    """Deal the samples out at random, so that every device sees the same distribution.

    Parameters
    ----------
    labels : ndarray of int64, shape (samples,)
        Label of each sample; only their number matters here.
    devices : int
        Number of parts, at most the number of samples.
    seed : int
        Not negative. The same seed gives the same split under the same release of NumPy.

    Returns
    -------
    list of ndarray of int64, length `devices`
        Positions in `labels` per device, ascending: disjoint, covering every sample, of sizes that differ by one at
        most.

    Raises
    ------
    UsageError
        There are more devices than samples, or an argument is out of range.
    """
    _check_arguments(labels, devices, seed, minimum=1)
    order = np.random.default_rng(seed).permutation(len(labels)).astype(np.int64)
    return [np.sort(part) for part in np.array_split(order, devices)]


def split_dirichlet(
    labels: NDArray[np.int64], devices: int, alpha: float, seed: int, minimum: int = 1
) -> list[NDArray[np.int64]]:
    """Split with skewed labels, drawn from a Dirichlet distribution.

    The Dirichlet label skew was introduced by Hsu et al. 2019 (arXiv 1909.06335), who draw the class shares of each
    of a set of equally large devices. Here the shares of each class over the devices are drawn instead, the form of
    Yurochkin et al. 2019 (arXiv 1905.12022), so that every sample is used and the devices differ in size too. The
    meaning of `alpha` is the same: small values put few classes on each device, large values approach an even split.

    Parameters
    ----------
    labels : ndarray of int64, shape (samples,)
        Label of each sample.
    devices : int
        Number of parts.
    alpha : float
        Concentration, above 0 and at most 1e6.
    seed : int
        Not negative. The same seed gives the same split under the same release of NumPy.
    minimum : int, optional
        Samples that every device holds at least; a device that drew fewer is given samples of the largest one, one
        at a time.

    Returns
    -------
    list of ndarray of int64, length `devices`
        Positions in `labels` per device, ascending: disjoint, covering every sample.

    Raises
    ------
    UsageError
        There are fewer than ``devices * minimum`` samples, or an argument is out of range.
    """
    _check_arguments(labels, devices, seed, minimum)
    if not 0 < alpha <= MAX_ALPHA:
        raise UsageError(
            f"Dirichlet split: alpha is {alpha}; give a number above 0 and at most {MAX_ALPHA:g}"
        )
    generator = np.random.default_rng(seed)
    # Shuffled, so that the end of a part, from which samples move, is a fair draw of that device's classes.
    parts = [generator.permutation(part) for part in _draw_parts(labels, devices, alpha, generator)]
    return [np.sort(part) for part in _raise_to_minimum(parts, minimum)]


def _draw_parts(
    labels: NDArray[np.int64], devices: int, alpha: float, generator: np.random.Generator
) -> list[NDArray[np.int64]]:
    """Cut each class, in random order, at the cumulative shares of a Dirichlet draw over the devices."""
    pieces: list[list[NDArray[np.int64]]] = [[] for _ in range(devices)]
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label)).astype(np.int64)
        shares = generator.dirichlet(np.full(devices, alpha))
        cuts = np.rint(np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
        for device, piece in enumerate(np.split(members, cuts)):
            pieces[device].append(piece)
    return [np.concatenate(device_pieces) for device_pieces in pieces]


def _raise_to_minimum(parts: list[NDArray[np.int64]], minimum: int) -> list[NDArray[np.int64]]:
    """Move samples from the end of the largest part, the first one on a tie, to parts below the minimum."""
    held = [[int(position) for position in part] for part in parts]
    sizes = np.array([len(part) for part in held])
    for device in np.flatnonzero(sizes < minimum):
        while sizes[device] < minimum:
            largest = int(np.argmax(sizes))
            held[device].append(held[largest].pop())
            sizes[device] += 1
            sizes[largest] -= 1
    return [np.array(part, dtype=np.int64) for part in held]


def _check_arguments(labels: NDArray[np.int64], devices: int, seed: int, minimum: int) -> None:
    if labels.ndim != 1:
        raise UsageError(f"split over devices: labels have shape {labels.shape}; give one label per sample")
    if devices < 1:
        raise UsageError(f"split over devices: {devices} devices asked for; ask for at least 1")
    if minimum < 1:
        raise UsageError(f"split over devices: minimum is {minimum} samples per device; give at least 1")
    if seed < 0:
        raise UsageError(f"split over devices: seed is {seed}; give 0 or more")
    if devices * minimum > len(labels):
        raise UsageError(
            f"split over devices: {len(labels)} samples cannot give {devices} devices {minimum} each; "
            "use fewer devices or more samples"
        )
