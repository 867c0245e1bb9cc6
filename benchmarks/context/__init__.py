"""When does long-range context help? Accuracy and Dice, beside a baseline trained in the same way."""
