"""The training run: options, the loop and its step, states to resume from, samples and logs."""
