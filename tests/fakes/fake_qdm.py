"""The command `qdm` with fake stages: `python tests/fakes/fake_qdm.py calibrate r.yaml`."""

from qdm_cli.main import main

ENGINE = {
    "stages": {name: f"fake_stages:{name}" for name in ("calibrate", "finetune", "export", "evaluate")},
    "base_digest": "fake_stages:base_digest",
}

if __name__ == "__main__":
    main(engine=ENGINE)
