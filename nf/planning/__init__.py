"""Which pipeline plan is the fastest for a model on a GPU; docs/planning.md explains it.

What a model costs on a machine, without measuring anything:
    hardware, operation_costs → cost_model → figures, heat_map

From measured nano-operations to the fastest measured plan:
    steady_replays → gpu_bench → profiling            what takes how long, alone and in pairs
    profile, profile_file                             that, as data
    interference                                      the R → P curves in it
    nano_layer → order, rounds → structure            Stage I: a layer cut and ordered
    overlap → resources                               Stage II: SMs of the streams, time and energy
    admission → shares                                Stage II as in the paper: a share per nano-operation
    loads, predict, gpu_step_bench → search           predicted, measured, and the fastest chosen
    search_record                                     what is told and kept of it

integer_program is the solver; svg, plan_picture, curve_picture and usage_picture draw. Only
steady_replays, gpu_bench and gpu_step_bench need a GPU.
"""
