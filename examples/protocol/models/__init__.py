"""What the options name: networks, detectors, and the loss on tokens."""
