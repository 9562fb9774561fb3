"""The parts of benchmarks/kill_campaign.py; tests/e2e/test_kill_resume.py uses them too."""
