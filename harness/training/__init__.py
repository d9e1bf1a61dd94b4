"""What the training of a round uses: layers, shard files, random keys, data, records."""
