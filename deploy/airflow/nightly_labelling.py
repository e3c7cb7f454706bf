"""Nightly labelling as an Airflow DAG (Airflow 2.7 or newer, also 3): ingest the day, say what it will cost, label, check.

Put it into the folder of the DAGs and set the Airflow variable `distilbeam_home` to the directory that holds `nightly.toml`
and `.venv`. Each task is the same command as by hand. A task that is killed is simply started again: what is committed stays.
"""

from datetime import datetime, timedelta

try:
    from airflow.providers.standard.operators.bash import BashOperator
    from airflow.sdk import DAG
except ImportError:  # Airflow 2
    from airflow.models.dag import DAG
    from airflow.operators.bash import BashOperator

COMMANDS = {
    "ingest": "distilbeam ingest incoming/{{ ds }} --out pool/{{ ds }} --format jsonl --id id",
    "plan": "distilbeam plan nightly.toml --sample 256 --json plan.json",
    "label": "distilbeam label nightly.toml --max-failures 1000 -- --direct_running_mode=multi_processing --direct_num_workers=4",
    "verify": "distilbeam verify labelling/labels --teacher nightly.toml --sample 100",
}

with DAG(
    dag_id="distilbeam_nightly_labelling",
    description="Ingest the day's examples, label what is new, check a sample of the labels",
    schedule="15 2 * * *",
    start_date=datetime(2026, 1, 1),
    catchup=False,
    max_active_runs=1,  # one job at a time holds the directory
    default_args={"retries": 3, "retry_delay": timedelta(minutes=10), "execution_timeout": timedelta(hours=8)},
    tags=["distilbeam"],
) as dag:
    previous = None
    for name, command in COMMANDS.items():
        task = BashOperator(
            task_id=name,
            bash_command=f"cd {{{{ var.value.distilbeam_home }}}} && .venv/bin/{command}",
        )
        if previous is not None:
            previous >> task
        previous = task
