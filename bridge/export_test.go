package bridge

// InterruptAt has the bridge call at at each place where it may be killed; an error ends it there.
func (c *Config) InterruptAt(at func(place string) error) { c.interrupt = at }
