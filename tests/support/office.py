"""A made-up office for the agent domain: the six CSV files, every number, name and text drawn from a seed."""

import csv
import random
from pathlib import Path

PEOPLE = ["ada.quill", "bo.fennel", "cleo.marsh", "dag.ilsen", "esi.okine", "finn.arrow", "gus.pome", "hana.reef"]
TOPICS = ["Otter census", "Paper boat race", "Lamp inventory", "Roof garden", "Tea tasting", "Map room move"]


def rows(seed: int, emails: int = 60, events: int = 40, tasks: int = 40, customers: int = 30, visits: int = 80):
    """File name -> its rows."""
    draw = random.Random(seed)
    person = lambda: f"{draw.choice(PEOPLE)}@office.example"  # noqa: E731
    numbers = lambda n: [f"{i:08d}" for i in draw.sample(range(n), n)]  # noqa: E731
    day = lambda: f"2023-{draw.randint(9, 11):02d}-{draw.randint(1, 30):02d}"  # noqa: E731
    clock = lambda: f"{draw.randint(9, 17):02d}:{draw.choice(('00', '30'))}:00"  # noqa: E731
    return {
        "analytics_data.csv": [
            {
                "date_of_visit": day(),
                "visitor_id": f"{draw.randint(0, 60):04d}",
                "page_views": draw.randint(1, 9),
                "session_duration_seconds": draw.randint(1, 90),
                "user_engaged": draw.choice((True, False)),
                "traffic_source": draw.choice(("direct", "referral", "search engine", "social media")),
            }
            for _ in range(visits)
        ],
        "calendar_events.csv": [
            {
                "event_id": n,
                "event_name": draw.choice(TOPICS),
                "participant_email": person(),
                "event_start": f"{day()} {clock()}",
                "duration": draw.choice((30, 60, 90)),
            }
            for n in numbers(events)
        ],
        "customer_relationship_manager_data.csv": [
            {
                "customer_id": n,
                "assigned_to_email": person(),
                "customer_name": f"Client {n[-3:]}",
                "customer_email": f"client{n[-3:]}@shop.example",
                "customer_phone": draw.choice(("", "555-0100")),
                "last_contact_date": f"{day()} 23:59:00",
                "follow_up_by": f"{day()} 23:59:00",
                "product_interest": draw.choice(("Software", "Hardware", "Services", "Consulting", "Training")),
                "status": draw.choice(("Qualified", "Won", "Lost", "Lead", "Proposal")),
                "notes": draw.choice(("", "Called")),
            }
            for n in numbers(customers)
        ],
        "emails.csv": [
            {
                "email_id": n,
                "inbox/outbox": "inbox",
                "sender/recipient": person(),
                "subject": draw.choice(TOPICS),
                "sent_datetime": f"{day()} {clock()}",
                "body": f'Dear all,\nabout the {draw.choice(TOPICS)}, "soon".',
            }
            for n in numbers(emails)
        ],
        "project_tasks.csv": [
            {
                "task_id": n,
                "task_name": f"Plan {draw.choice(TOPICS)}",
                "assigned_to_email": person(),
                "list_name": draw.choice(("Backlog", "In Progress", "In Review", "Completed")),
                "due_date": day(),
                "board": draw.choice(("Back end", "Front end", "Design")),
            }
            for n in numbers(tasks)
        ],
        "email_addresses.csv": [f"{name}@office.example" for name in PEOPLE],
    }


def write(folder: Path, seed: int = 0, **sizes: int) -> Path:
    """Write the six files; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in rows(seed, **sizes).items():
        with (folder / name).open("w", encoding="utf-8", newline="") as lines:
            if isinstance(table[0], str):
                lines.write("\n".join(table) + "\n")
            else:
                writer = csv.DictWriter(lines, table[0].keys())
                writer.writeheader()
                writer.writerows(table)
    return folder
