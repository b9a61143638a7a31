"""Pages for people: one HTML file of a run, of several, of a pipeline, of what prep wrote."""
