"""Matches the classes of the student and the teacher by name."""

import difflib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mmkd.data.class_names import match_names
from mmkd.data.errors import some
from mmkd.errors import ConfigError

WHERE = 'distillation.teacher.class_map'
NAMED = 100
"""As many classes of each network are named in a message."""


class ClassMap:
    """Matches the classes of the student and the teacher by name.

    Equal names match. So do the spellings of the well-known data sets:
    ``pottedplant`` and ``Potted Plant``, VOC's ``sofa`` and COCO's ``couch``
    (``mmkd.data.class_names.ALIASES``).

    Args:
        student: The student's class names.
        teacher: The teacher's class names.
        by_hand: The teacher's name of some of the student's classes, or None
            for a class that is to be left out. The other classes are matched
            by name.
        aliases: Names that mean the same, in addition to those of the data
            sets, such as ``dict(bike='bicycle')``.

    Attributes:
        identical: Whether both have the same classes in the same order.
        shared: The student's names of the classes that both have, in its
            order.
        renamed: Those of them that the teacher calls otherwise, with its
            names.
        unmatched: The student's classes that the teacher does not know; not
            those that ``by_hand`` leaves out.
        unused: The teacher's classes that the student does not know.
        student_index: (S,) the student's indices of the S shared classes.
        teacher_index: (S,) the teacher's indices of the same classes.
        to_teacher: (student's classes + 1,) the teacher's label for each of
            the student's labels and, last, for the background; -1 for a
            class that the teacher does not know.
        to_student: (teacher's classes,) the student's label for each of the
            teacher's labels, or -1.

    Raises:
        ConfigError: If no class is shared, one network names a class twice,
            or ``by_hand`` has a name that does not exist or a class of the
            teacher twice.

    Example:
        >>> ClassMap(['cat', 'dog'], ['dog', 'cow']).teacher_index
        tensor([0])
        >>> print(ClassMap(['sofa', 'cow'], ['cow', 'couch']))
        2 shared by name: sofa (couch), cow (student 2, teacher 2)
        >>> ClassMap(
        ...     ['bike'], ['bicycle'], aliases=dict(bike='bicycle')
        ... ).shared
        ['bike']
    """

    def __init__(
        self,
        student: Sequence[str],
        teacher: Sequence[str],
        by_hand: Mapping[str, str | None] | None = None,
        aliases: Mapping[str, str] | None = None,
    ) -> None:
        self.student, self.teacher = tuple(student), tuple(teacher)
        self.by_hand, self.aliases = dict(by_hand or {}), dict(aliases or {})
        for role in ('student', 'teacher'):
            _check_unique(role, getattr(self, role))
        self._check_by_hand()
        matches = self._matches(self.aliases)
        known = {n: t for n, t in (matches | self.by_hand).items() if t}
        self.shared = [name for name in self.student if name in known]
        self.renamed = {n: known[n] for n in self.shared if n != known[n]}
        self.unmatched = [name for name, match in matches.items() if not match]
        if not self.shared:
            raise ConfigError(
                'the teacher and the student share no class name. Student: '
                f'{some(student, NAMED)}. Teacher: {some(teacher, NAMED)}.'
                f'{_nearest(self.student, self.teacher)} Use a '
                'teacher of the same classes, or give them the same names '
                'through metainfo=dict(classes=...), or name the pairs in '
                f'{WHERE}=dict(...).'
            )
        used = [known[name] for name in self.shared]
        self.unused = [name for name in self.teacher if name not in used]
        ours = [self.student.index(name) for name in self.shared]
        theirs = [self.teacher.index(name) for name in used]
        self.identical = (
            ours == theirs == list(range(len(self.student)))
            and not self.unused
        )
        self.student_index = torch.tensor(ours)
        self.teacher_index = torch.tensor(theirs)
        self.to_teacher = torch.full((len(self.student) + 1,), -1)
        self.to_teacher[self.student_index] = self.teacher_index
        self.to_teacher[-1] = len(self.teacher)
        self.to_student = torch.full((len(self.teacher),), -1)
        self.to_student[self.teacher_index] = self.student_index

    def uses(self, alias: str) -> bool:
        """Return whether one of the aliases changes what is matched."""
        others = {k: v for k, v in self.aliases.items() if k != alias}
        return self._matches(others) != self._matches(self.aliases)

    def _matches(self, aliases: Mapping[str, str]) -> dict[str, str | None]:
        """Return the matches by name of what is not matched by hand."""
        taken = {*self.by_hand.values()}
        return match_names(
            [name for name in self.student if name not in self.by_hand],
            [name for name in self.teacher if name not in taken],
            aliases,
        )

    def to(self, device: torch.device | str) -> 'ClassMap':
        """Move the index tensors to ``device``, in place."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
        return self

    def __str__(self) -> str:
        if self.identical and not self.renamed:
            return f'identical ({len(self.student)} classes)'
        names = (
            f'{name} ({self.renamed[name]})' if name in self.renamed else name
            for name in self.shared
        )
        return (
            f'{len(self.shared)} shared by name: {", ".join(names)} '
            f'(student {len(self.student)}, teacher {len(self.teacher)})'
        )

    def _check_by_hand(self) -> None:
        for names, known, whose in (
            (self.by_hand, self.student, 'student'),
            (self.by_hand.values(), self.teacher, 'teacher'),
        ):
            for name in names:
                if name is not None and name not in known:
                    raise ConfigError(
                        f'{WHERE} maps the names of student classes to those '
                        f'of the teacher, or to None; the {whose} has no '
                        f'class {name!r}. It has: {", ".join(known)}.'
                    )
        used = [name for name in self.by_hand.values() if name is not None]
        twice = sorted({name for name in used if used.count(name) > 1})
        if twice:
            raise ConfigError(
                f'{WHERE} gives a class of the teacher to two of the student '
                f'({", ".join(twice)}). Each class has one counterpart at '
                'most: map the other one to None.'
            )


def _nearest(student: Sequence[str], teacher: Sequence[str]) -> str:
    """Return in a sentence which names are spelt nearly alike."""
    found = []
    for name in student:
        if close := difflib.get_close_matches(name, teacher, n=1, cutoff=0.8):
            found.append(f'{name} / {close[0]}')
    return f' Spelt nearly alike: {some(found)}.' if found else ''


def _check_unique(role: str, names: Sequence[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            f'the {role} names a class twice ({", ".join(twice)}), so classes '
            'cannot be mapped by name. Give every class a name of its own in '
            'metainfo=dict(classes=...).'
        )
