"""Images without labels: sources, views, the stream of batches."""
