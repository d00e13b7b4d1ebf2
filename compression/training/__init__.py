"""How a compressed model is healed.

- `adapters`: What of a model is trained, and how it is put back: adapters that are merged at the
  end, or parameters in place.
- `block_training`: Train one block of a model and nothing else.
- `distillation`: Next-token loss and distillation from a teacher, in bounded memory whatever the
  vocabulary.
- `finalists`: Which of several compressed models is kept, after each was trained back for a few
  equal steps.
- `objective`: What recovery minimises: token windows in, the loss of the student beside its teacher
  out.
- `recovery`: Recovery: a compressed model is trained for a while, by itself or after its dense
  teacher.
- `sharding`: A model spread over the processes of a training: each block is put together where it
  computes.
- `teacher_states`: What a frozen teacher makes of windows that are trained on more than once,
  computed once.
- `training_checkpoints`: The checkpoints of a training: each a folder that appears whole, of one
  file or of one for each process that holds a part of the model.
- `training_loop`: A training loop that survives being killed: its schedule, its data order, its
  steps.
"""
