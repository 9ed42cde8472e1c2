"""`qdm inspect` of artifacts with a cache schedule."""

from __future__ import annotations

from pathlib import Path

import pytest

from qdm_cli.commands.inspect import schedule_summary
from qdm_cli.engine.artifact import Artifact, FileEntry, Manifest
from qdm_cli.engine.caching.schedule import Cut, Figures, ModelRef, Provenance, SamplerRef, schedule_from_refreshes, write_schedule

MANIFEST = Manifest(schema=1, kind="cached", stage="cache", key="k", digest="d", files={"schedule.json": FileEntry(bytes=1, sha256="")})


@pytest.mark.parametrize("verified", [False, True])
def test_a_schedule_is_summed_up(tmp_path: Path, verified: bool) -> None:
    sampler = SamplerRef(
        class_="X", steps=4, calls=4, timesteps=(4.0, 3.0, 2.0, 1.0), log_snr=(-3.0, -1.0, 1.0, 3.0), step_of_call=(0, 1, 2, 3)
    )
    schedule = schedule_from_refreshes(
        (0, 2),
        cuts=[Cut(id="up2", kind="unet_up", m=2)],
        model=ModelRef(class_="Y", config_sha256="0"),
        sampler=sampler,
        provenance=Provenance(method="dp"),
        predicted=Figures(speedup=1.5),
        verified=Figures(speedup=1.4) if verified else None,
    )
    write_schedule(tmp_path, schedule)
    assert schedule_summary(Artifact(tmp_path, MANIFEST)) == {
        "method": "dp",
        "calls": 4,
        "full_calls": 2,
        "cuts": ["up2"],
        "speedup": 1.4 if verified else 1.5,
        "verified": verified,
        "corrected": False,
        "mask": "1010",
    }


def test_other_artifacts_have_none(tmp_path: Path) -> None:
    assert schedule_summary(Artifact(tmp_path, MANIFEST.model_copy(update={"files": {}}))) is None
