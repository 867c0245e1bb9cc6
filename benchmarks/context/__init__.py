"""When does long-range context help? Accuracy and Dice, next to a baseline that was trained in the same way."""
