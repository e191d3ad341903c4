"""The server's nouns: names, configurations of streams and consumers, declaring, reading, watching. Private."""
