"""The papers, reproduced: one command an exhibit (``python -m paper.figure_4``), all of them
(``python -m paper.all``), and the document that says what agrees (``python -m
paper.reproduction``).

A module of an exhibit is named as in ``EXHIBITS``, and holds::

    '''Four quadratics: gradient descent and Adam (figure 8).'''

    @dataclass(frozen=True)
    class Settings:      # all that the numbers depend on, but for the seed; plain values
        starts: int = 100

    def measure(settings: Settings, context: Context) -> dict[str, pd.DataFrame]:
        '''The work. Trainings and spectra go into context.runs / <name of the run>, which all
        exhibits share, and which go on where they were stopped; tables of exhibits that are
        needed are in context.needed.'''

    def draw(tables: Mapping[str, pd.DataFrame]) -> dict[str, Figure]:
        '''The figures by name, from the tables alone: seconds, without a model.'''

    def judge(tables: Mapping[str, pd.DataFrame]) -> list[Finding]:
        '''Each claim of the paper, what was measured with its error, agrees / disagrees / not
        comparable, and why.'''

    EXHIBIT = Exhibit(
        name="figure_8", title="…", source="…", measure=measure, draw=draw, judge=judge,
        needs=(), shown=(),
        scales={
            "small": Scale(Settings(), setup="…", cost="20 s on one core"),
            "paper": Scale(Settings(…), setup="…", cost="…"),
        },
    )

    if __name__ == "__main__":
        command(EXHIBIT)

``command`` gives it ``--scale small|paper``, ``--out``, ``--seed``, ``--settings.<field>``,
``--workers`` and ``--device``. The result is ``<out>/<scale>/<name>/``: ``<table>.parquet``,
``record.json``, ``findings.json``, ``figures/``. A second run reads the tables and draws anew.
"""

EXHIBITS = (
    "figure_1",
    "figure_2",
    "figure_3",
    "figure_4",
    "figure_5",
    "figure_5_mixer",
    "figure_6",
    "figure_7",
    "table_1",
    "figure_8",
    "adam_mini_blocks",
    "pyhessian_traces",
    "pyhessian_landscapes",
    "adahessian_functions",
    "optimizers_blocks",
)
"""In the order of the document."""
