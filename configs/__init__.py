"""One file per dataset; `default` has every key."""
