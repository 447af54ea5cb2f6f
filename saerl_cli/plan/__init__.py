"""What a job needs before it runs: memory and time.

Sizes are counted on the job's own objects, built on torch's meta device: `meta`, and for the commands `language`,
`saes` and `rlhf`. Times and peak memory come from short runs of the very command, extrapolated in a straight line
(`probe`); where it may not run here, from the operations that torch counts on those objects and rates (`machine`).
"""
