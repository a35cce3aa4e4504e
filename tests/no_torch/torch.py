"""In torch's place for runs: training needs none, and tensorboardX would import it, which takes 2 seconds."""

raise ImportError('a run imported torch')
