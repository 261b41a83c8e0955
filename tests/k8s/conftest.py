"""Every set of manifests that a site may put together, for tests that hold for all."""

from __future__ import annotations

import pytest

from tests.k8s.rendered import SETS, Manifest, overlay, with_components


@pytest.fixture(params=sorted(SETS))
def manifests(request: pytest.FixtureRequest) -> list[Manifest]:
    name, components = SETS[request.param]
    return with_components(name, components) if components else overlay(name)
