"""What scripts/gpu-check runs: stages, each by itself and within a bound, which say what a GPU does with taps."""
