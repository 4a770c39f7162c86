"""From files to batches: where a data set lies, what is read of it, in which order, and how images are changed."""
