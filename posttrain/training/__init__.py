"""Training: the optimizer, one exact step, checkpoints that survive a crash, and the loop over
them."""
