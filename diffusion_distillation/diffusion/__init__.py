"""The mathematics of diffusion: the process, schedules, times, weightings and samplers."""
