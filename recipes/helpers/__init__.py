"""What several recipes share: tasks, measurements, comparisons of arms."""
