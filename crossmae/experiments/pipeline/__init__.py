"""The pipeline of `crossmae run`: images and labels in, a detector and its page out, within a budget of time."""
