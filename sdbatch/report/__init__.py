"""What people see of a run: progress, the closing report, status, verify, the dataset card."""
