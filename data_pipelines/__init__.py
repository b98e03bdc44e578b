"""Programs that build data sets.  Training never imports them."""
