"""Wheels that pip takes, with files of data in them."""

import zipfile


def pack_wheel(path, name, version, files, metadata):
    """Write a wheel that pip takes, with a licence where ``files`` has one."""
    info = f'{name.replace("-", "_")}-{version}.dist-info'
    with zipfile.ZipFile(path, 'w') as packed:
        for place, content in files.items():
            packed.writestr(place.format(info=info), content)
        packed.writestr(
            f'{info}/METADATA',
            f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n'
            f'{metadata}\n',
        )
        packed.writestr(
            f'{info}/WHEEL',
            'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n',
        )
        packed.writestr(f'{info}/RECORD', '')
