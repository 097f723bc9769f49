"""Many runs of one question: which values of the config's keys are best."""
