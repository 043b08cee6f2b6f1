"""Long runs that measure what the tests in tests/faults only check: `python -m tests.soak [NAME]`, or `make soak`."""
