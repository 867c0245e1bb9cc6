"""Does SIFTDetector find and match what other detectors do, and how fast?"""
