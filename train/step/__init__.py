"""The training step: state, augmentation on the device, loss, optimizer, schedules."""
