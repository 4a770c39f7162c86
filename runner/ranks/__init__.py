"""One run on several processes: how they find one another, share a batch, norm alike, and notice that one is gone."""
