"""The networks and detectors that options name, the cache of keypoints, and the loss on tokens."""
