"""The private names of torch that the library leans on, all of them, and what a lack of each means.

==============================  ====================================  ============================
name                            what for                              on a torch without it
==============================  ====================================  ============================
TorchDispatchMode               seeing every operation of a forward   import fails: no support
pytree                          leaves of nested outputs              import fails: no support
_disable_current_modes          keeping the shape look-up of a        import fails: no support
                                dropped module out of user's modes
FakeTensorMode                  shapes of a dropped module's output   a new input shape at a
                                for inputs of a new shape             closed gate raises
_current_graph_task_id          "is a backward running?"              import fails: no support
_top/_push/_pop_saved_          the checkpoint frame of a forward     2.6 has no _top: found on the
tensors_default_hooks,          and of its recomputation              Python stack instead
_CheckpointFrame
queue_callback                  None instead of zeros for what no     import fails: no support
                                rank ran, after the reduction
_active_ddp_module,             "is this DistributedDataParallel?";   training on processes raises
_post_forward                   hanging parameters on its output
_is_fsdp_managed_module,        telling who holds a module's          training in shards raises
_fsdp_flattened                 parameters
_get_fsdp_state, _state_ctx,    what fully_shard casts, and what it   training in shards raises
_mp_policy, _states_to_*_       prefetches by explicit lists
prefetch, _post_forward_indices
_orig_mod,                      gating the wrapper of a block; "did   a block that its user
_compiled_call_impl,            its user compile it?"                 compiled raises when called
_checkpoint_wrapped_module
set_eval_frame,                 what a user compiles goes on beneath  import fails: no support
skip_code, _torchdynamo_        a gate, which no graph holds
disable
_is_any_autocast_enabled        "which dtype has the next output?",   import fails: no support
                                in one call
_get_is_fx_tracing              "does torch.fx trace this thread?"    inference raises while
                                                                      another thread compiles
maybe_mark_dynamic              one graph for all numbers of rows     graphs in mode "sample" raise
activation_relu_or_gelu         calling the parts of torch's own      inference under no_grad
                                encoder layer in inference, too       raises
ProcessGroup.unbox,             among which ranks a collective is,    a collective in a branch is
_resolve_process_group          seen as an operation                  not refused, and may hang
==============================  ====================================  ============================

`tests/test_private_torch_names.py` fails loudly where one of them changed its meaning.
"""
