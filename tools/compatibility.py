"""Write docs/compatibility.md; see mmkd/doctor/compatibility.py."""

from mmkd.doctor.compatibility import main

if __name__ == '__main__':
    main()
