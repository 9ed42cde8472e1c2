"""Timings of single layers and whole denoisers, each behind a correctness gate, as one JSON object per machine."""
