"""Hosts that are made out of network namespaces on one machine."""

from __future__ import annotations

import os
import shutil
import sys

import pytest
import ray_nodes


def test_an_environment_that_no_host_would_see_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = ray_nodes.RAY_FOLDER / "clone"
    monkeypatch.setattr(shutil, "which", lambda program: program)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(sys, "prefix", str(hidden))
    assert str(hidden) in str(ray_nodes.why_no_namespaces())
