"""Does SIFTDetector find and match the same keypoints as other detectors, and how fast is it?"""
