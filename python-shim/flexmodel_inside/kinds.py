"""Kinds of taps: the codes of `wire::hooks::Kind`."""

from __future__ import annotations

FORWARD, FORWARD_PRE, BACKWARD, BACKWARD_PRE, PARAM, GRAD = range(6)
