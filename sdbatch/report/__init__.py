"""What people see of a run: the plan, progress, status, the closing report and the output's pages.

Nothing here changes the dataset: `scores` and `sheet` add files of their own to an output.
"""
