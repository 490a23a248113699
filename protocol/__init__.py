"""The wire contract between server and devices: topics, messages, manifests, tensor files and chunks."""
