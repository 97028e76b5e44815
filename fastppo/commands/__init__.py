"""Commands of `fastppo` whose work is the command line's own: a module each, imported when its command is given."""
