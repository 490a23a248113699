"""A fleet on one desktop: a broker, a server and virtual devices over real MQTT connections."""
