"""Training of the nets. So far the step itself: see `train.step`."""
