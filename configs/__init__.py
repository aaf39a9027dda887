"""One file a data set; `default` has every key."""
