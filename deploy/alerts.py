"""Register automations.yaml with the server of PREFECT_API_URL, and where its notifications go.

    FOLDSTACK_ALERT_URL=https://hooks.example/... python deploy/alerts.py

Without the address only what notifies nobody is registered: runs that give no sign of life are
marked as crashed. Every topology does that when it comes up, as such a run would keep its place in
the queue for ever.

The address takes a POST of {"text": "subject, then body"}, as Slack's and Mattermost's incoming
webhooks do. It is a secret: it lies in the block `foldstack-alerts` and comes from the environment.
Run it again after a change of either; automations of the same names are replaced. For e-mail,
Teams, PagerDuty and so on, make that block by hand and set its id in a copy of automations.yaml.
Set PREFECT_FLOWS_HEARTBEAT_FREQUENCY here as for the runs: how long one may be silent follows it.
"""

import argparse
import asyncio
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import foldstack.flows.prefect_defaults  # noqa: F401 (before Prefect)

AUTOMATIONS = Path(__file__).resolve().parent / "automations.yaml"
BLOCK = "foldstack-alerts"
VARIABLE = "FOLDSTACK_ALERT_URL"


async def register(url: str) -> list[str]:
    """Make or renew the block and the automations; gives the names of the latter.

    Those that notify stay as they are where there is no address.
    """
    from prefect.client.orchestration import get_client
    from prefect.events.schemas.automations import AutomationCore

    found = automations(await _block(url) if url else "")
    if not url:
        found = [each for each in found if not notifies(each)]
    wanted = [AutomationCore.model_validate(each) for each in found]
    async with get_client() as client:
        for automation in wanted:
            for old in await client.read_automations_by_name(automation.name):
                await client.delete_automation(old.id)
            await client.create_automation(automation)
    return [automation.name for automation in wanted]


async def _block(url: str) -> str:
    """Id of the block that holds the address."""
    from prefect.blocks.notifications import CustomWebhookNotificationBlock

    block = CustomWebhookNotificationBlock(
        name=BLOCK,
        url="{{url}}",
        json_data={"text": "{{subject}}\n{{body}}"},
        secrets={"url": url},
    )
    return str(await block.save(BLOCK, overwrite=True))


def notifies(automation: Mapping[str, Any]) -> bool:
    """Whether it needs an address."""
    return any("block_document_id" in action for action in automation["actions"])


def automations(block_id: str) -> list[dict[str, Any]]:
    """Those of automations.yaml, which notify by this block."""
    import yaml

    found: list[dict[str, Any]] = yaml.safe_load(AUTOMATIONS.read_text())["automations"]
    for trigger in [each["trigger"] for each in found if each["trigger"]["posture"] == "Proactive"]:
        trigger["within"] *= heartbeats_come_slower()
    for action in [action for each in found for action in each["actions"]]:
        if "block_document_id" in action:
            action["block_document_id"] = block_id
    return found


def heartbeats_come_slower() -> float:
    """How much more time passes between two than by default, which automations.yaml is made for."""
    from prefect.settings import get_current_settings
    from prefect.settings.models.flows import FlowsSettings

    usual: int = FlowsSettings.model_fields["heartbeat_frequency"].default
    return (get_current_settings().flows.heartbeat_frequency or usual) / usual


def main(arguments: Sequence[str] | None = None) -> None:
    description = (__doc__ or "").splitlines()[0]
    told = f"The address that notifications go to is read from {VARIABLE}."
    argparse.ArgumentParser(description=description, epilog=told).parse_args(arguments)
    url = os.environ.get(VARIABLE, "")
    for name in asyncio.run(register(url)):
        print(f"registered: {name}")
    if not url:
        print(f"nobody is told of anything new: {VARIABLE} must hold the address for that")


if __name__ == "__main__":
    main()
