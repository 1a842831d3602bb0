"""What the layers cost: their time beside the framework's own BatchNorm and the machine's copy bandwidth."""
